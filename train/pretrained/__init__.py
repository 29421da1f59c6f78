"""Models in Hugging Face's format: to them, from them, and hybrids made of them.

`families` is the table of what transformers has too, `described` reads the settings of one,
`links` says which rows of which of
their tensors are ours, `tokenizer` writes what AutoTokenizer reads, `weights` keeps and finds
tensors by name. On these stand `adopt` (the command is `import`) and `convert`, with `distil` for
the layers that have something to learn first; `folder`, which opens a model whoever wrote it; and
`export`.
"""
