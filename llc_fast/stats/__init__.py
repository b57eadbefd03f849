"""Statistics of arrays: numbers in, numbers out, with NumPy alone; nothing of the package is imported here."""
