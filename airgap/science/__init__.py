"""What the models read and write: grammar, typed tasks, sealed chemistry, screens and views.

`grammar`, `tasks`, `results`, `svg` and `views` belong to the broker. `program`, `assessment`,
`molecules`, `structures`, `drawing` and `screens` run in the sealed helper and are the only ones to
load RDKit and gemmi.
"""
