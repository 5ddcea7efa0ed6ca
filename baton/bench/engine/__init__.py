"""How fast the engine computes, beside llama.cpp, OpenVINO GenAI, vLLM (CPU) and CTranslate2.

Every engine works in a process of its own, on the same cores and with the same number of threads, on
random weights of the same shape; in each round each of them takes its turn, and a ratio is taken
within its round. Peers are optional: `scripts/install_peers.py` puts them into a virtual environment.
"""
