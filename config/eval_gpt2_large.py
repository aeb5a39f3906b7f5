# The loss of OpenAI's gpt2-large on the data set. python train.py config/eval_gpt2_large.py
init_from = "gpt2-large"
eval_only = True
batch_size = 8
eval_iters = 500
