"""Plain implementations of editing methods: what `raysys bench editing` measures ours against.

They do what the published implementations do, on the network and the tokenizer alone: the whole model runs on whole
texts at every step and gives logits at every position over the whole vocabulary, texts are padded to the longest, a
linear system is solved by LU for every edit, statistics take one pass over the corpus per layer. They make no forward
or backward call and feed no token that the published ones would not, and use nothing of `methods`. That they are
right is tested against recorded vectors (test_plain.py).
"""
