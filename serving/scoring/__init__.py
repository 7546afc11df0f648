"""Batch scoring: predict the class of many images, and write one table of scores.

An interrupted run can be resumed. The model runs on this machine or on a Ray cluster.
"""
