"""A small world of pictures, a judge of what stands in one, and the parts of a pipeline that draws it."""
