# WiggleGPT for a consumer card with 8 GB: oscillators on two dendrites, sparse events. 83.45M parameters with GPT-2's
# 50,304 ids, 38.8M of them the tables. Plain twin: wigglegpt_8gb_baseline. python data/openwebtext/prepare.py
# Training takes 2.4 GB at 2 sequences per micro-batch; --cost shows its parts, and the time here.
# python train.py config/presets/wigglegpt_8gb.py
base(
    "config/train_gpt2.py", sample_interval=500, init_from="auto", batch_size=2, gradient_accumulation_steps=16,
    max_iters=200_000, dtype="float16", compile=False,
)  # fmt: skip
out_dir = "out-wigglegpt-8gb"
n_layer, n_head, n_embd, block_size = 4, 6, 384, 1024
use_bio_mlp = True
bio_compartments = 2
bio_threshold = 0.25
