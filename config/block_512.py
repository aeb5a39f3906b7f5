# After a recipe: contexts of 512 tokens, for ideas that need room (cells of 32 tokens, say). 1024 tokens per step.
# python train.py config/train_shakespeare_char_cpu.py config/block_512.py config/ablation/block_sparse_1.py
block_size = 512
batch_size = 2
