# The loss of OpenAI's gpt2-medium on the data set. python train.py config/eval_gpt2_medium.py
init_from = "gpt2-medium"
eval_only = True
batch_size = 8
eval_iters = 500
