"""Packs: many targets that share frozen genes, trained as one program."""
