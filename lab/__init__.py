"""The lab: everything that asks how good, how fast, or what if.

The lab imports the core, that is the six files one level up. The core never imports the lab.

To add an experiment, add a file here, a subclass in it that changes the model or the training in
one place, and a row in a table of results: the world with the change and without it.
"""
