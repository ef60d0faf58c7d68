"""The protocol of delivery as a state machine, small enough to be explored whole. docs/model.md says what for.

    world.py     the rules, a sentence each, and what there is: read it first
    broker.py    reserve, settle, renew, open, recover: a script each
    daemon.py    what a daemon asks for, and what it makes of the answers
    steps.py     all that may happen next: to daemons, of itself, and the faults
    explore.py   every state, breadth first, and the properties

`python -m tests.model` explores more than the tests do. Nothing here imports KQueue.
"""
