-- purpose:    which generated images are checked
-- reads:      image_path
-- returns:    shard, row, uid
-- parameters: none
select shard, row, uid
from samples
where image_path is not null
