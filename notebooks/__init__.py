"""Notebooks: each .py is the source of the .ipynb beside it; `python -m notebooks.execute` runs them."""
