"""What benchmarks/numerics.py is made of: the inputs (values.py, cases.py), whose numbers are held to float64
(providers.py), how (table.py), and the page that tells of it (page.py). Nothing here is timed.
"""
