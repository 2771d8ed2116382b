"""From rows of a results CSV to pages: tables, pictures, the README's section, docs/benchmarks.md, a web page.

Nothing is measured here and torch is not imported. cases.py groups rows, defeats.py finds where a peer wins and
reasons.py says why, tables.py and plots.py show, document.py renders, chapters.py says what stands on which page.
"""
