# The published BioMLP for a consumer card with 8 GB: 83M parameters, 61M of them in the BioMLPs.
# python data/openwebtext/prepare.py
# python train.py config/train_gpt2_bio_8gb.py
out_dir = "out-gpt2-bio-8gb"
dataset = "openwebtext"
vocab_size = 50304
n_layer, n_head, n_embd, block_size = 4, 6, 384, 1024
bias = False
use_bio_mlp = True
bio_compartments = 2
bio_threshold = 0.25
batch_size = 2
gradient_accumulation_steps = 16
dtype = "float16"
learning_rate = 6e-4
max_iters = 200_000
warmup_iters = 2000
weight_decay = 0.1
eval_interval = 1000
eval_iters = 200
log_interval = 10
