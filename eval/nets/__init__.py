"""Student networks of the field that no library keeps."""
