"""The gate that candidates pass, and the champion that users get."""
