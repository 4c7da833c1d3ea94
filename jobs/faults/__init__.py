"""Faults on purpose, and what must hold all the same.

==============  ========================================================================================
``schedule``    what goes wrong when: a pure function of a seed and a time
``corruption``  how a plan is made bad: pure
``planner``     the actor that makes plans bad, stalls and dies on schedule
``invariants``  what may never happen, checked on recorded tokens and counters: pure
``recovery``    hit rates over time, and how long they take to come back: pure
``growth``      how fast a process grows, whatever the outliers: pure
``processes``   the processes of a local Ray, from ``/proc``
``load``        clients that keep generations running and have every one checked
``campaign``    a generator under load and faults, or under load alone
``nodes``       nodes that are lost under a training run, and come back
==============  ========================================================================================
"""
