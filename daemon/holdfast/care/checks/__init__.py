"""What ``verify`` looks at, part by part: each gives what it found."""
