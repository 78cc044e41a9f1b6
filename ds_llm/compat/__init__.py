"""What we use of other libraries beyond their stable interface: one module for each library.

`NAMES` of such a module lists each private, internal or unstable name, where it lies and what it is for. A test fails
where the rest of the code reaches one by itself. `versions` holds the ranges that were tested.
"""
