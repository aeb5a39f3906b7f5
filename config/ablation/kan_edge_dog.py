# The published Wav-KAN layer with wavelet "dog"; slow.
out_dir = "out-ablation/kan_edge_dog"
use_kan = True
kan_edges = "edge"
kan_wavelet = "dog"
