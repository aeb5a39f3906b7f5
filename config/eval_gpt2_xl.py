# The loss of OpenAI's gpt2-xl on the data set. python train.py config/eval_gpt2_xl.py
init_from = "gpt2-xl"
eval_only = True
batch_size = 8
eval_iters = 500
