# ruff: noqa
# mypy: ignore-errors
# fmt: off
import torch

class RMSNorm(torch.nn.Module):
	def __init__(self, width):
		super().__init__()
		self.gain = torch.nn.Parameter(torch.empty(width))
		self.reset_parameters()

	def reset_parameters(self):
		torch.nn.init.ones_(self.gain)

	def forward(self, x):
		return self.gain * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)

class Attention(torch.nn.Module):
	def __init__(self, width, heads=2):
		super().__init__()
		self.heads = heads
		self.q, self.k, self.v, self.o = (torch.nn.Linear(width, width, bias=False) for _ in range(4))

	def forward(self, x):
		q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
		y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
		return self.o(y.transpose(1, 2).flatten(2))

class GatedMLP(torch.nn.Module):
	def __init__(self, width):
		super().__init__()
		self.gate, self.up = (torch.nn.Linear(width, 2 * width, bias=False) for _ in range(2))
		self.down = torch.nn.Linear(2 * width, width, bias=False)

	def forward(self, x):
		return self.down(torch.nn.functional.silu(self.gate(x)) * self.up(x))

class Base(torch.nn.Module):
	"""What all models here share: blocks, and an embedding that a subclass may build in its own way."""

	def __init__(self, vocabulary=80, width=20, depth=2):
		super().__init__()
		self.embed = self.make_embedding(vocabulary, width)
		for i in range(depth):   
			self.add_module(f"block{i}", torch.nn.Sequential(RMSNorm(width), Attention(width)))
			self.add_module(f"mlp{i}", torch.nn.Sequential(RMSNorm(width), GatedMLP(width)))
		self.depth = depth
		self.final = RMSNorm(width)
		self.head = torch.nn.Linear(width, vocabulary, bias=False)

	def make_embedding(self, vocabulary, width):
		return (torch.nn
			.Embedding(vocabulary, width))

	def forward(self, tokens):
		x = self.embed(tokens)
		for i in range(self.depth):
			x = x + getattr(self, f"block{i}")(x)
			x = x + getattr(self, f"mlp{i}")(x)
		return self.head(self.final(x))

class Classifier(Base):
	"""Another model of the family: it is not built here, and stays as it is."""

	def __init__(self, classes, **sizes):
		super().__init__(**sizes)
		self.head = torch.nn.Linear(self.embed.embedding_dim, classes)

class LanguageModel(Base):
	"""Everything is inherited."""
	# the end of the class

def build(**sizes):
	return LanguageModel(**sizes)
