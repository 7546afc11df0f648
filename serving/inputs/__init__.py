"""Image sources of batch scoring: folders, lists, tar archives, object stores."""
