# A wavelet on every edge, as in Wav-KAN, with Differences of Gaussians; slow.
out_dir = "out-ablation/kan_edge_dog"
use_kan = True
kan_edges = "edge"
kan_wavelet = "dog"
