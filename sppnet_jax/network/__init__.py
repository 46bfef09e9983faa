"""What is trained: trunk, pyramid and head, and what pixels become before it."""
