"""`python -m kdkernels info --check`: whether the losses are right on the machine that they are to run on.

Each loss on each backend that is here is held against its formula in float64 and against published values, called
twice for the same bits, and timed. numbers.py is the judge, which the tests share; golden.py the published values;
inputs.py what the losses are called with; targets.py which backends are here; checks.py the checks; speed.py the times;
facts.py the line for a bug report; command.py what is printed. Nothing in the library imports this package.
"""
