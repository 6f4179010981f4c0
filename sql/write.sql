-- purpose:    the samples that differ from the source; what is not returned is copied bit for bit
-- reads:      image_*, prompt
-- returns:    shard, row, uid and any of
--               dropped       true: the sample is left out
--               image_path, image_offset, image_size, image_width, image_height, image_sha256, image_seed,
--               image_model, image_prompt, prompt    the new image; its caption is image_prompt, always
--               caption       a new caption for a sample that keeps its image
--               set_<name>    a json field to set
-- parameters: none
select shard, row, uid,
       image_path, image_offset, image_size, image_width, image_height, image_sha256, image_seed,
       image_model, image_prompt, prompt
from samples
where image_path is not null
