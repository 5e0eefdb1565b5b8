"""Runs: from a config to steps, checkpoints, metrics and a report.

    trainer     the loop over steps           executor     one step
    evaluation  held-out data                 checkpoint   everything needed to go on
    workdir     one run in one folder         console      what the terminal shows
    report      the page that ends a run      figures      its pictures

Read `trainer`, then `executor`; `run` is what they get, checked.
"""
