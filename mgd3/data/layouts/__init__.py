"""How real images lie on disk or come there: folders, archives, tables."""
