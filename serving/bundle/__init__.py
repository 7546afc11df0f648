"""Bundles, the folders that hold exported models: manifest, storage, signatures."""
