"""Algorithms: functions that turn episodes into per-token credit and a loss.

`algorithm` is the record of the functions that make up a method, `hooks` defines their types, `recipe` the
hyper-parameters under a name, `functional` the mathematics, and `methods` holds one file per method.
"""
