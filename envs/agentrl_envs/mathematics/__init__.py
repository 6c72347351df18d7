"""What a mathematical answer says: its notation, kind and value, and whether two answers are equal."""
