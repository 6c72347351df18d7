"""Algorithms: records of pure functions (`algorithm`), the maths they are made of (`functional`), methods."""
