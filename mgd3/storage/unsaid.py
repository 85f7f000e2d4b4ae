"""What an identity leaves out, as if there were no such key: sets of before keep theirs."""

UNSAID = {"refine": "none", "prompts": "class", "encoding_precision": "float32"}  # by key
