"""The ground floor: what production runs. Never imports torch, training or export."""
