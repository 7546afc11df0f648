"""The folders of a data set: what is in them, and which layout of classes and parts they have."""
