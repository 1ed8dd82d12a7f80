"""What a user may set: the fields, the rules between them, and how files and words become a Config."""
