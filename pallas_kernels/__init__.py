"""Operations worth their own code, one folder each.

`api` is what callers use, with the choice of an implementation; `reference` is the
plain definition that tests compare with. Nothing here imports the rest of the project.
"""
