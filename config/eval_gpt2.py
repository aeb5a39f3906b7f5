# The loss of OpenAI's gpt2 on the data set. python train.py config/eval_gpt2.py
init_from = "gpt2"
eval_only = True
batch_size = 8
eval_iters = 500
