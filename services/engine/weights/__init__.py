"""Weights as they are served: formats, the quantiser and the packed file that workers map."""
