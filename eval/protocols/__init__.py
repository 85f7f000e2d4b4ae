"""How a student is trained and tested: hard labels, soft labels, teachers."""
