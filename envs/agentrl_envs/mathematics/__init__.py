"""What a mathematical answer says: its notation read into kinds of answers, its value, and equality of both."""
