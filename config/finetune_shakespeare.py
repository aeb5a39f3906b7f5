# GPT-2 fine-tuned on Shakespeare for a few steps at a constant, small learning rate.
# python data/shakespeare/prepare.py && python train.py config/finetune_shakespeare.py
out_dir = "out-shakespeare"
init_from = "gpt2-xl"
dataset = "shakespeare"
batch_size = 1
gradient_accumulation_steps = 32  # 32 x 1024 tokens a step; the training split has 301,966
learning_rate = 3e-5
decay_lr = False
max_iters = 20
eval_interval = 5
eval_iters = 40
always_save_checkpoint = False
