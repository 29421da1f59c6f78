"""Text to ids and back, without loss.

`tokenizer` is the front: SentencePiece models and `tokenizer.json` files as one interface, and
training one on a `sample`. `pieces` says which bytes each piece stands for, `beside` what the files
beside a foreign tokenizer say of it, `windows` codes long texts, `spelling` gives text as ids come.
Imports the settings, and for the sample the sources.
"""
