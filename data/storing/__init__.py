"""Tokens on disk: coded in many processes, written so that nothing is lost, mapped for reading.

`encode` codes documents, `store` writes shards with a journal and digests, `corpus` maps what is
stored, `held_out` is what a model is measured on. Imports the settings, sources and tokens.
"""
