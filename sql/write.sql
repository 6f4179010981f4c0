-- purpose:    the samples that differ from the source; what is not returned is copied bit for bit
-- reads:      image_path, image_offset, image_size, image_width, image_height, image_sha256, image_seed, image_model,
--             image_prompt, prompt
-- returns:    shard, row, uid, image_path, image_offset, image_size, image_width, image_height, image_sha256,
--             image_seed, image_model, image_prompt, prompt
-- parameters: none
--
-- The caption of a new image is always its image_prompt. These columns may be returned too, or instead of the image:
--   image_format  jpg, png or webp, if the image is not the one that the table's image_format describes
--   dropped       true: the sample is left out
--   caption       a new caption for a sample that keeps its image
--   set_<name>    a json field to set
select shard, row, uid,
       image_path, image_offset, image_size, image_width, image_height, image_sha256, image_seed,
       image_model, image_prompt, prompt
from samples
where image_path is not null
