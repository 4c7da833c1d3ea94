"""The commands of ``crsm``, one a file. Each imports torch and Ray only once it knows what to do."""
