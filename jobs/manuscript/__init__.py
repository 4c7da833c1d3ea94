"""The paper's figures: everything in ``docs/paper`` that is a measurement comes from a result file through here.

===========  =====================================================================================
``sources``  the result files, and the command that makes each
``numbers``  how a figure is written in LaTeX, and the macros of the prose: pure
``tables``   the tables, from results: pure
``speed``    the tables of speed: pure
``seven``    macros and tables of the seven kinds of problems: pure
``pictures`` the figures, from results: pure
``prose``    what must hold of the text: macros and citations known, no measurement typed: pure
===========  =====================================================================================
"""
