"""Bundles (folders with an exported model): manifest, files, signatures."""
