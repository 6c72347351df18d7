"""Mathematical answers: parsing of their notation, their values, and equality."""
