"""Algorithms: what turns episodes into per-token credit and a loss.

`algorithm` is the record of functions that a method is, `hooks` their types, `recipe` the hyper-parameters by
name, `functional` the mathematics, and `methods` has one file for each method.
"""
